"""What a person asks for, told in order."""
