"""Turning a trained or saved adapter into something else: plain LoRA, a merged model, a table, a hub repository."""
