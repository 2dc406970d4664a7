"""OpenAI's protocol: chat with tools, and completions, each as a call of /generate."""
