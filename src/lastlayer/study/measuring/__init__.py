"""What layers and models cost and what they can express: time, memory, rank."""
