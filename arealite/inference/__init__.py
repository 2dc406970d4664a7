"""The built-in inference server ("native"): the trainer's Hugging Face modelling code behind SGLang's wire."""
