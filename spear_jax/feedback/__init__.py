"""Comments on wrong answers: an oracle's, a person's, or those of a provider of your own."""
