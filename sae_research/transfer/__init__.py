"""Does an SAE of a base model serve a finetuned one? Two models, one text, one pass each."""
