"""How much of exact attention a selection holds, by budget, on a user's own keys and queries."""
