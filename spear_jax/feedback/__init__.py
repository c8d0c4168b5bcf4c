"""Who comments on wrong answers: an oracle, a person, or a provider of your own."""
