variable "project" {
  description = "The Google Cloud project."
  type        = string
}

variable "name" {
  description = "Of budget and channel."
  type        = string
}

variable "billing_account" {
  description = "The billing account that the budget watches; empty: no budget."
  type        = string
  default     = ""

  validation {
    condition     = var.billing_account == "" || can(regex("^[0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6}$", var.billing_account))
    error_message = "billing_account must be like 01ABCD-234567-89EFAB, or empty."
  }
}

variable "monthly_budget" {
  description = "In the billing account's currency; mails at a half, nine tenths and the whole of it, and when the forecast passes it."
  type        = number
  default     = 200

  validation {
    condition     = var.monthly_budget >= 1 && floor(var.monthly_budget) == var.monthly_budget
    error_message = "monthly_budget must be a whole number of at least 1."
  }
}

variable "email" {
  description = "Who gets the mails besides the billing account's administrators; empty: nobody."
  type        = string
  default     = ""
}
