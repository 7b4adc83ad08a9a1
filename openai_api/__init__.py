"""What OpenAI's API and its kin say: paths, errors, events, chunks, transcripts, limits. Pure: no I/O, no clock."""
