"""What a setting scores, on a live model; and the search for the largest strength within a bound."""
