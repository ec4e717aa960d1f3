output "budget" {
  description = "The budget's name; null without a billing account."
  value       = one(google_billing_budget.this[*].name)
}
