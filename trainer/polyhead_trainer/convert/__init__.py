"""`trainer convert`: Meta's Llama layout, GGUF and Hugging Face directories into one another, and any into int8."""
