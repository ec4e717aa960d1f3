"""What strangers, other tenants and bad input are answered."""
