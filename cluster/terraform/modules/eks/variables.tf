variable "name" {
  type = string
}

variable "kubernetes_version" {
  type = string
}

variable "subnets" {
  type = list(string)
}

variable "kms_key" {
  type = string
}

variable "administrators" {
  description = "Private ranges that may reach the API server, by name."
  type        = map(string)
}

variable "administrator_roles" {
  description = "IAM roles that administer the cluster, by name."
  type        = map(string)
}
