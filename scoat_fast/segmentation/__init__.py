"""The main job: CT in, masks, pictures and numbers out."""
