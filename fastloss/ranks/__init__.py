"""What processes tell each other, and where DTensors lie."""
