"""The Hugging Face Hub: models are downloaded by name and uploaded with a card."""
