"""What a command found, as one value with several faces: terminal, JSON, later HTML and SARIF."""
