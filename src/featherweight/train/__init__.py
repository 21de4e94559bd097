"""Training: recipes, the loop on Lightning Fabric, exact resume, averaging, distillation."""
