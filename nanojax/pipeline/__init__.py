"""How do the operations of a step run?"""
