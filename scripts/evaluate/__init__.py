"""What a trained run can do, measured by its loss on texts and by what it recalls."""
