"""Text: where it comes from (packaged, local folder, hub), the one split, token contexts, probing tasks.

`split` decides for every text which part of the project may see it; `corpus` yields documents; `tokens` packs them into
token contexts; `tasks` gives labelled texts to the probing evaluations. Only `tokens` needs torch.
"""
