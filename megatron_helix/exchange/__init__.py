"""What moves over the dim axis, in closed form and in deed."""
