from ibeton.workers import before_torch

before_torch()  # imports of commands come later
