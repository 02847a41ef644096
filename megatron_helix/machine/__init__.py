"""What the devices of a machine and the links between them do."""
