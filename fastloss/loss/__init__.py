"""The loss: public functions, autograd, the form that compilers see, and the form over several ranks."""
