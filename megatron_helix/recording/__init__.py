"""What a rank writes down while it trains: time and bytes of collectives, what it holds."""
