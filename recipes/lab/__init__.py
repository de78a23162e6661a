"""What the scripts of recipes/ share: importable, and it imports none of them.

data/        one file for each data set (digits, fashion_mnist, folder, shapes), registered in
             datasets.py, which says what a data set is; images.py: files and classes of a folder;
             latents.py, encoding.py: a VAE and its cache; order.py: which images a step sees
diffusion/   objective.py: what is predicted, and the loss; schedule.py: the noise; guidance.py:
             images from noise, with classifier-free guidance; randomness.py: without a state
training/    settings.py: all that decides a run; rules.py, flags.py, settings_file.py: what each
             may be, its flag, a file of them; checkpoint.py, run_files.py: the layout of a run's
             folder and what its files may hold; batches.py: images, times, noise and label dropout
             of a step; optimizer.py, ema.py: what moves the weights, their average; session.py:
             one call that trains; description.py, banner.py: what a run is, for config.json and
             for a person; loop.py, trainer.py: its steps; state.py: saving and restoring;
             recorded.py: a step as one CUDA graph; build.py: data and model; guard.py, memory.py,
             status.py
evaluation/  scores.py: one entry for each metric; metrics.py: their mathematics; evaluate.py: one
             call that measures; features.py, inception.py: what looks at images;
             shape_classifier.py: exact, for shapes; real.py, reference.py: what they are compared
             with; shards.py: generated images; cache.py: what evaluations share
drawing/     colors and pictures
sampling.py  images from a run; distributed.py: several processes; files.py: the one place that
             writes; console.py: errors, flags, progress; imports.py: mechanisms of one's own
"""
