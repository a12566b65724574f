"""What every verb promises about every model of the zoo."""
