variable "account" {
  type = string
}

variable "region" {
  type = string
}

variable "zones" {
  description = "Three zones, so that spot nodes come from one or the other."
  type        = list(string)
}

variable "backup_region" {
  description = "Another region than `region`: the ledger's backups must outlive it."
  type        = string

  validation {
    condition     = var.backup_region != var.region
    error_message = "backup_region: a region's loss must not take the backups with it; name another."
  }
}

variable "backup_kms_key" {
  description = "A key of that region for the backups."
  type        = string
}

variable "name" {
  description = "The NodePools in eks/karpenter name it too."
  type        = string
  default     = "headrace"
}

variable "namespace" {
  type    = string
  default = "serving"
}

variable "release" {
  type    = string
  default = "headrace"
}

variable "kubernetes_version" {
  type    = string
  default = "1.34"
}

variable "range" {
  type    = string
  default = "10.0.0.0/16"
}

variable "administrators" {
  description = "Private ranges that may reach the API server, by name."
  type        = map(string)

  validation {
    condition = alltrue([
      for range in values(var.administrators) : can(regex("^(10\\.|172\\.(1[6-9]|2[0-9]|3[01])\\.|192\\.168\\.)", range))
    ])
    error_message = "administrators: private ranges only; the API server has no public address."
  }
}

variable "administrator_roles" {
  description = "IAM roles that administer the cluster, by name."
  type        = map(string)
}

variable "database_class" {
  type    = string
  default = "db.m7g.large"
}
