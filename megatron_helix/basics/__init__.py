"""What everything stands on: a user's mistakes, files in one piece, signals."""
