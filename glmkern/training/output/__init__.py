"""What a run writes and shows: folder, logs, reports, samples."""
