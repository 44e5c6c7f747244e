variable "name" {
  type = string
}

variable "cluster" {
  type = string
}

variable "vpc" {
  type = string
}

variable "subnets" {
  type = list(string)
}

variable "node_security_group" {
  type = string
}

variable "namespace" {
  description = "Where the chart is installed."
  type        = string
}

variable "release" {
  description = "The chart's release, or its fullnameOverride: its service accounts are named by it."
  type        = string
}

variable "database_class" {
  type = string
}

variable "backup_region" {
  description = "Another region than the database's."
  type        = string
}

variable "backup_kms_key" {
  description = "A key of that region for the backups."
  type        = string
}
