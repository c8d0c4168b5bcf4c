"""From prompts to graded text: prompts, generation with continuous batching, scoring of tokens."""
