# Headrace on EKS. `terraform init -backend-config=backend.hcl`, then plan and apply with a tfvars file.

terraform {
  required_version = ">= 1.11, < 2.0"

  # Bucket, key and region come from backend.hcl: state is shared, versioned and encrypted.
  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "6.25.0"
    }
    random = {
      source  = "hashicorp/random"
      version = "3.7.2"
    }
  }
}

provider "aws" {
  region              = var.region
  allowed_account_ids = [var.account]

  default_tags {
    tags = { project = var.name }
  }
}

module "pools" {
  source = "../modules/pools"

  values_file       = "${path.module}/../../charts/headrace/values-eks.yaml"
  accelerator_label = "karpenter.k8s.aws/instance-gpu-name"
}

module "network" {
  source = "../modules/aws-network"

  name  = var.name
  range = var.range
  zones = var.zones
}

module "cluster" {
  source = "../modules/eks"

  name                = var.name
  kubernetes_version  = var.kubernetes_version
  subnets             = module.network.node_subnets
  kms_key             = aws_kms_key.secrets.arn
  administrators      = var.administrators
  administrator_roles = var.administrator_roles
}

# The cluster's own key: it must be there before the cluster, the data after it.
resource "aws_kms_key" "secrets" {
  description             = "${var.name}: Kubernetes' secrets"
  enable_key_rotation     = true
  deletion_window_in_days = 30

  lifecycle {
    prevent_destroy = true
  }
}

module "karpenter" {
  source = "../modules/karpenter"

  cluster       = module.cluster.name
  node_role_arn = module.cluster.node_role_arn
}

module "data" {
  source = "../modules/aws-data"

  name                = var.name
  cluster             = module.cluster.name
  vpc                 = module.network.vpc
  subnets             = module.network.node_subnets
  node_security_group = module.cluster.security_group
  namespace           = var.namespace
  release             = var.release
  database_class      = var.database_class
  backup_region       = var.backup_region
  backup_kms_key      = var.backup_kms_key
}
