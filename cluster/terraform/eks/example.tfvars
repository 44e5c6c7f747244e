account             = "111122223333"
region              = "eu-west-1"
zones               = ["eu-west-1a", "eu-west-1b", "eu-west-1c"]
backup_region       = "eu-central-1"
backup_kms_key      = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-0000-0000-000000000000"
administrators      = { office = "10.20.0.0/16" }
administrator_roles = { platform = "arn:aws:iam::111122223333:role/platform" }
