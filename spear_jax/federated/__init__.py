"""A round over clients: who takes part, local training, aggregation."""
