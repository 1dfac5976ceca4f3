"""Language models: loading them, adapters, generating text, longer contexts, what is added to their layers."""
