"""Files for clusters, ready to edit: what a training needs (`deployment`), put into the templates beside this file (`rendering`)."""
