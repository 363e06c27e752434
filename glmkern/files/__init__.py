"""Files and folders without torch: a model's folder by its name, and atomic writes; a file each."""
