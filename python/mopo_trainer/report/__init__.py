"""What people look at: tables, figures, measurements of a trained model."""
