"""OpenAI's and Anthropic's APIs: paths, errors, events, chunks, transcripts, limits. Pure: no I/O, no clock."""
