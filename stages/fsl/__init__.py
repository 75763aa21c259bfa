"""Few-shot learning: episodes, prototypes, augmentation."""
