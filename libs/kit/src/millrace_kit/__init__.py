"""What every Millrace service shares; knows nothing of any one service."""
