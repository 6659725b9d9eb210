"""What a person is shown: text that a terminal can take, masks in colour, plots."""
