"""Narrow siblings of models, trained here on real text: the corpus, the trainer, and the recording of their routing."""
