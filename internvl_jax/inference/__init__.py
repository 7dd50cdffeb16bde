"""From a checkpoint to answers: loading, jitted generation, sampling, beam search, chat, offline batches."""
