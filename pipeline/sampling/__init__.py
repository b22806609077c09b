"""What is random, by (seed, epoch, sample): order, crop draws, masks."""
