"""What requests arrive: lengths, arrival processes, sessions with shared prefixes, public traces."""
