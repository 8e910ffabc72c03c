"""Read a run: tables, figures, a page, comparisons. Never imports TensorFlow or Keras."""
