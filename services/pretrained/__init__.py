"""What a base model's directory holds, read the same way by a replica and by the trainer: weights, tokenizer, chat template."""
