project         = "my-project"
region          = "europe-west4"
zones           = ["europe-west4-a", "europe-west4-b", "europe-west4-c"]
backup_location = "europe-west1"
administrators  = { office = "10.20.0.0/16" }
