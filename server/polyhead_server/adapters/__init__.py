"""Adapter types: each reads PEFT's own directory and says what it adds at which site. Knows no pool, no request."""
